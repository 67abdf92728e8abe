"""From texts to embeddings: token batches (`batching`), the pipeline, `EmbeddingModel`, and stores of embeddings on disk. Here
too is the reranker, which scores pairs."""

DOOR = {
    "batching": "default_token_budget make_token_batch split_micro_batches TokenBatch".split(),
    "embedding_model": "default_device EmbeddingModel FlagModel line_for_all_gpus".split(),
    "pipeline": "encode_texts EncodingCounts prefetch".split(),
    "reranker": "Reranker SHORTEST_PAIR".split(),
    "store": "digest_texts EmbeddingStore MANIFEST Manifest missing_shards prepare_store read_manifest ShardWriter StorePart".split(),
    "storing": "encode_to_store tokenizer_digest weights_digest".split(),
    "transfer": "encoder_inputs to_device to_host".split(),
}
"""The names that other rooms and scripts may use, by module."""
