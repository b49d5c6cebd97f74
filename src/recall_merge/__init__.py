"""recall-merge: one language model that keeps everything its owner ever fine-tuned into it."""
