"""The parts of a pipeline that all generators share: requests, sampling options, inputs and outputs."""
