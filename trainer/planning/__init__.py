"""What a run will cost, by arithmetic: parameters, tokens, memory, disk, FLOPs. No weights are loaded."""
