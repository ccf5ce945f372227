"""How attention is spread over ranks: a strategy around any backend."""
