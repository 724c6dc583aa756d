"""What the engine costs, alone and beside others."""
