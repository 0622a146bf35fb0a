"""The offline library: reviewed cards (Markdown with front matter) and the search over them."""

from tui.library.cards import Card, LibraryError, Source
from tui.library.search import Library, Passage, SearchResult, SearchWeights

__all__ = ["Card", "Library", "LibraryError", "Passage", "SearchResult", "SearchWeights", "Source"]
