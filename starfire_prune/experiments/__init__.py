"""Tables of runs: trained, resumed and set beside the paper's numbers."""
