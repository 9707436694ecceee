"""The run store, and Datasets in and out of it: torch-free, crash-safe, one writer, any number of readers."""

from hoanalysis.store.core import Store, StoreWarning
from hoanalysis.store.exchange import export, is_store, open_dataset, open_store
from hoanalysis.store.lock import unlock

__all__ = ["Store", "StoreWarning", "export", "is_store", "open_dataset", "open_store", "unlock"]
