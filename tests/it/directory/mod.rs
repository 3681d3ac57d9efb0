//! Directories: what they show, share, store, and how they scale.

mod cache;
mod discover;
mod faults;
pub(crate) mod scale;
mod shared;
mod snapshots;
