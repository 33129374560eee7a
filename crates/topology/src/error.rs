//! Why a snapshot could not be taken at all. Single files that cannot be read are not errors, they are noted.

use std::io;
use std::path::PathBuf;

use crate::DumpError;

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
    /// A file that should hold a dump cannot be read.
    #[error("cannot read {}: {source}; give a dump (`lstopo --of xml`, NCCL_TOPO_DUMP_FILE) or a folder that holds sys and proc", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// A file is not a dump that can be understood.
    #[error("{}: {source}", path.display())]
    Dump {
        /// The file.
        path: PathBuf,
        /// Where and what.
        source: DumpError,
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
