"""An empty SGLANG_EXTERNAL_MODEL_PACKAGE: with one, SGLang imports its 200 model files only when it needs them."""
