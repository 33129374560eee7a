//! Bounded reading of the kernel's text files. Every file access of the crate is here, and none of it writes.
//!
//! A file that is not there is an ordinary answer. A file that is there and says nothing we understand is noted, so
//! that a person can see why a value is missing.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::{Roots, TopologyError};

/// The most bytes read from one file. The longest that we read, a CPU list or a meminfo, is under 16 KiB.
pub const TEXT_BYTES_MAX: usize = 64 * 1024;

/// The most entries listed from one directory. A host with SR-IOV has thousands of PCI functions, one with many
/// containers thousands of network devices; more than this is not a host.
pub const ENTRIES_MAX: usize = 16 * 1024;

/// A file that exists but could not be used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Unread {
    /// The file.
    pub path: PathBuf,
    /// Why: the operating system's words, or what was expected in place of what stood there.
    pub reason: String,
}

/// The text was not what the kernel documents; carries what was expected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Malformed(pub(crate) &'static str);

/// `Ok(None)`: well formed, and says that the value is not known.
pub(crate) type Parsed<T> = Result<Option<T>, Malformed>;

/// The two roots, and what could not be used below them so far.
pub(crate) struct Tree {
    roots: Roots,
    unread: Vec<Unread>,
}

impl Tree {
    pub(crate) fn open(roots: &Roots) -> Result<Self, TopologyError> {
        match fs::read_dir(&roots.sys) {
            Ok(_) => Ok(Self { roots: roots.clone(), unread: Vec::new() }),
            Err(source) => Err(TopologyError::Root { path: roots.sys.clone(), source }),
        }
    }

    pub(crate) fn into_unread(self) -> Vec<Unread> {
        self.unread
    }

    pub(crate) fn sys(&self, path: &str) -> PathBuf {
        self.roots.sys.join(path)
    }

    pub(crate) fn proc(&self, path: &str) -> PathBuf {
        self.roots.proc.join(path)
    }

    /// The trimmed text of a file, given to `parse`. `None` when there is no such file, when it does not apply to its
    /// device, when it says "unknown", and (noted) when it is unreadable or odd.
    pub(crate) fn read<T>(&mut self, path: &Path, parse: impl FnOnce(&str) -> Parsed<T>) -> Option<T> {
        let text = match read_text(path, TEXT_BYTES_MAX) {
            Ok(text) => text,
            Err(error) if says_absent(&error) => return None,
            Err(error) => {
                self.note(path, error.to_string());
                return None;
            }
        };
        match parse(text.trim()) {
            Ok(value) => value,
            Err(Malformed(expected)) => {
                let found: String = text.trim().chars().take(80).collect();
                self.note(path, format!("expected {expected}, found {found:?}"));
                None
            }
        }
    }

    /// The file's text, trimmed; an empty file says nothing.
    pub(crate) fn text(&mut self, path: &Path) -> Option<String> {
        self.read(path, |text| Ok((!text.is_empty()).then(|| text.to_owned())))
    }

    /// Names in a directory, in natural order; none if it is not there.
    pub(crate) fn names(&mut self, dir: &Path) -> Result<Vec<String>, TopologyError> {
        let entries = match fs::read_dir(dir) {
            Ok(entries) => entries,
            Err(error) => {
                if !says_absent(&error) {
                    self.note(dir, error.to_string());
                }
                return Ok(Vec::new());
            }
        };
        let mut names = Vec::new();
        for entry in entries {
            if names.len() == ENTRIES_MAX {
                return Err(TopologyError::TooManyEntries { path: dir.to_owned(), entries_max: ENTRIES_MAX });
            }
            match entry.map(|entry| entry.file_name().into_string()) {
                Ok(Ok(name)) => names.push(name),
                Ok(Err(name)) => self.note(&dir.join(name), "the name is not UTF-8".to_owned()),
                Err(error) => {
                    self.note(dir, error.to_string());
                    break;
                }
            }
        }
        names.sort_by_cached_key(|name| natural_key(name));
        Ok(names)
    }

    fn note(&mut self, path: &Path, reason: String) {
        self.unread.push(Unread { path: path.to_owned(), reason });
    }
}

/// A non-negative decimal number, as most attributes are.
pub(crate) fn number(text: &str) -> Parsed<u64> {
    text.parse().map(Some).map_err(|_| Malformed("a number"))
}

/// The whole file, if it has at most `bytes_max`.
pub(crate) fn read_text(path: &Path, bytes_max: usize) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(bytes_max as u64 + 1).read_to_string(&mut text)?;
    if text.len() > bytes_max {
        return Err(io::Error::other(format!("longer than {bytes_max} bytes")));
    }
    Ok(text)
}

/// The errors by which the kernel says that an attribute does not apply: no such file, EINVAL (`speed` of a link that
/// is down), EOPNOTSUPP, and ENXIO or ENODEV from a device that is just leaving.
fn says_absent(error: &io::Error) -> bool {
    const ENXIO: i32 = 6;
    const ENODEV: i32 = 19;
    const EINVAL: i32 = 22;
    const EOPNOTSUPP: i32 = 95;
    error.kind() == io::ErrorKind::NotFound
        || matches!(error.raw_os_error(), Some(ENXIO | ENODEV | EINVAL | EOPNOTSUPP))
}

/// Orders digits by their value: `(text, number)` pairs, so that `mlx5_2` comes before `mlx5_10`.
pub(crate) fn natural_key(name: &str) -> (Vec<(String, u128)>, String) {
    let mut parts = Vec::new();
    let mut rest = name;
    while !rest.is_empty() {
        let (text, tail) = rest.split_at(rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len()));
        let digits_len = tail.find(|c: char| !c.is_ascii_digit()).unwrap_or(tail.len());
        let (digits, tail) = tail.split_at(digits_len);
        // More digits than fit are all "very large"; the name itself then decides.
        let value = if digits.is_empty() { 0 } else { digits.parse().unwrap_or(u128::MAX) };
        parts.push((text.to_owned(), value));
        rest = tail;
    }
    (parts, name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_sort_as_people_count() {
        let mut names = vec![
            "mlx5_10",
            "mlx5_2",
            "eth0",
            "mlx5_02",
            "",
            "7",
            "99999999999999999999999999999999999999999",
        ];
        names.sort_by_cached_key(|name| natural_key(name));
        assert_eq!(
            names,
            ["", "7", "99999999999999999999999999999999999999999", "eth0", "mlx5_02", "mlx5_2", "mlx5_10"]
        );
    }

    #[test]
    fn too_long_a_file_is_noted_and_not_used() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("long");
        fs::write(&path, "7".repeat(TEXT_BYTES_MAX + 1)).unwrap();
        let mut tree =
            Tree::open(&Roots { sys: dir.path().to_owned(), proc: dir.path().to_owned() }).unwrap();
        assert_eq!(tree.text(&path), None);
        assert_eq!(tree.into_unread().len(), 1);
    }
}
