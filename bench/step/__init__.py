"""One optimizer step of MLM distillation: ours beside the original distiller's form."""
