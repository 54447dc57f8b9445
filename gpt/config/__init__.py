"""The typed schema, its rules, and what follows from a configuration by arithmetic. No Hydra, no Paddle."""
