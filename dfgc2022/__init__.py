"""The DeepFake Game Competition 2022: detectors, video pipeline, scoring of both tracks, cross-evaluation."""
