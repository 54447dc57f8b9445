"""Process groups, and the communication of a rank: gradients, ZeRO, pipeline, the semi-auto engine."""
