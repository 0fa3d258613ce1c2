"""Learning algorithms: each module offers `init`, `act`, `prepare`, `update` (see `types.Algorithm`)."""
