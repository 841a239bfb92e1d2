"""What the commands of `gpuslice` share: their texts, their parser, what they print and in which form."""
