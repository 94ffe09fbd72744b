"""The guides, and the script that draws their pictures."""
