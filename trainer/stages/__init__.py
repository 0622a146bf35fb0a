"""The paper's four stages, thin over TRL: CPT, SFT, DFPO and PSFT with MUE."""
