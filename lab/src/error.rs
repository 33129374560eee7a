//! Why a lab could not be built, changed or removed, and what to do about it.
//!
//! Written out by hand: this crate has no dependency.

use std::fmt;
use std::io;
use std::path::PathBuf;

use crate::NAME_BYTES_MAX;

/// What went wrong.
#[derive(Debug)]
#[non_exhaustive]
pub enum LabError {
    /// Namespaces are root's.
    NotRoot,
    /// A program is not installed.
    Missing {
        /// Which.
        program: &'static str,
    },
    /// No name of a lab.
    Name {
        /// What was given.
        name: String,
    },
    /// An option that cannot be built.
    OutOfRange {
        /// Which, with its unit.
        what: &'static str,
        /// What was given.
        value: u64,
        /// The least that is allowed.
        least: u64,
        /// The most that is allowed.
        most: u64,
    },
    /// The lab does not have this link.
    Link {
        /// What was given.
        link: u16,
        /// How many there are.
        links: u16,
    },
    /// A living process has the lab.
    InUse {
        /// The lab.
        name: String,
        /// Its process id, where it could be read.
        process: Option<u32>,
    },
    /// A lab of this name was left standing on purpose.
    Standing {
        /// The lab.
        name: String,
    },
    /// A NIC was set up, but the kernel does not say that it is.
    NotUp {
        /// Where.
        namespace: String,
        /// For how long.
        waited: std::time::Duration,
        /// What `ip link` says of it.
        line: String,
    },
    /// `ip`, `tc` or another program failed.
    Command {
        /// The command, and the line of its input at which it failed.
        command: String,
        /// What it said.
        stderr: String,
    },
    /// A program did not start, or a file could not be read or written.
    Io {
        /// What was tried.
        what: String,
        /// The system's answer.
        source: io::Error,
    },
}

impl LabError {
    pub(crate) fn file(path: &std::path::Path) -> impl FnOnce(io::Error) -> Self {
        let path = PathBuf::from(path);
        move |source| Self::Io { what: format!("cannot use {}", path.display()), source }
    }
}

impl fmt::Display for LabError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotRoot => {
                f.write_str("network namespaces need root: run this as root, for example with sudo")
            }
            Self::Missing { program } => {
                write!(f, "there is no `{program}` here; install iproute2 (apt-get install iproute2)")
            }
            Self::Name { name } => write!(
                f,
                "{name:?} cannot be a lab's name: use up to {NAME_BYTES_MAX} of a-z, 0-9 and -, not - at first"
            ),
            Self::OutOfRange { what, value, least, most } => {
                write!(f, "{what}: {value} is not within {least} to {most}")
            }
            Self::Link { link, links } => {
                write!(f, "there is no link {link}: the lab has {links}, and links count from 0")
            }
            Self::InUse { name, process } => {
                write!(f, "the lab {name} is in use")?;
                if let Some(process) = process {
                    write!(f, " by process {process}")?;
                }
                f.write_str(": end that first, it takes its lab down; or choose another name")
            }
            Self::Standing { name } => {
                write!(f, "the lab {name} stands already: take it down first, or choose another name")
            }
            Self::NotUp { namespace, waited, line } => {
                write!(
                    f,
                    "a NIC in {namespace} is not up after {waited:?}: {line}; try again on a less busy machine"
                )
            }
            Self::Command { command, stderr } => {
                write!(f, "`{command}` failed: {}", stderr.trim())?;
                if stderr.contains("Operation not permitted") {
                    f.write_str(" (a container needs CAP_SYS_ADMIN and CAP_NET_ADMIN)")?;
                }
                Ok(())
            }
            Self::Io { what, source } => write!(f, "{what}: {source}"),
        }
    }
}

impl std::error::Error for LabError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io { source, .. } => Some(source),
            _ => None,
        }
    }
}
