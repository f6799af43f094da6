"""Judges of generated video: metrics, the toybox detector, exports, benchmarks."""
