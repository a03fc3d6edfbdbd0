"""Its place puts tests/ on the import path: helpers here (reference_decoder) are importable from every folder below."""
