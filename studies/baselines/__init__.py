"""Other methods that compute CAMs during training. Only benchmarks and evidence import them."""
