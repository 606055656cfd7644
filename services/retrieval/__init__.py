"""Memory: documents, chunks, embeddings, hybrid search and the semantic answer cache. No prompts, no models, no money."""
