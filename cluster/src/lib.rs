//! Starts real nodes.
