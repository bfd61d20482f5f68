"""The HTTP side of serving: what clients of OpenAI, of text-embeddings-inference and of pipelines send, and get."""
