//! Why a snapshot could not be taken at all. Single files that cannot be read are not errors, they are noted.

use std::io;
use std::path::PathBuf;

/// A failure that leaves no snapshot.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TopologyError {
    /// The sysfs root cannot be listed.
    #[error("cannot list {}: {source}; mount sysfs there, or name the folder that holds it", path.display())]
    Root {
        /// The root that was given.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// A directory holds more entries than any real host has.
    #[error("{} holds more than {entries_max} entries; is it a sysfs or proc tree?", path.display())]
    TooManyEntries {
        /// The directory.
        path: PathBuf,
        /// The bound that it breaks.
        entries_max: usize,
    },
}
