//! Directories: snapshots, sharing, the cache, faults and scale.

mod cache;
mod discover;
mod faults;
pub(crate) mod scale;
mod shared;
mod snapshots;
mod uncallable;
