"""From text to a tokenizer: MeCab segmentation, SentencePiece training, export, quality report.  Not needed at run time."""
