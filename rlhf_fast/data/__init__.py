"""From a data file to token ids: reading rows, encoding them with a tokenizer, padding them to batches."""
