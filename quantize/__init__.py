"""From a finished run folder to one verified GGUF file and its distribution folder."""
