"""Text or images in, batches of tokens out."""

from train.data.batches import Batch, evaluated_bytes, held_out_batches, training_batches
from train.data.corpus import Corpus, load_corpus

__all__ = ["Batch", "Corpus", "evaluated_bytes", "held_out_batches", "load_corpus", "training_batches"]
