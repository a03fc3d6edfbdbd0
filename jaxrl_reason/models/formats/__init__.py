"""Models of others, in and out: the families of config.json, tensors in files, directories, GGUF files, PEFT adapters."""
