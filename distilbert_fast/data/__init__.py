"""Data to train and evaluate models: corpora, tasks, tagged words, questions; read, checked and tokenized."""

IGNORED = -100  # the label of a row that does not count, as in torch and transformers
