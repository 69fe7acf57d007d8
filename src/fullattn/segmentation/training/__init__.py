"""Training on Lightning: a configuration, a data set, and steps that can be resumed bit for bit."""
