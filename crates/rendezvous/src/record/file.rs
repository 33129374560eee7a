//! The controller's record of the last commit: one small file, replaced whole and synced before anybody is told.
//!
//! Text, so that a person can read it; its last line is a checksum, so that nobody takes a damaged one for an order. A file
//! that is not whole is an error and not "nothing committed": a controller that forgot a commit would contradict ranks that
//! serve it.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::error::RendezvousError;
use crate::protocol::{Commit, PushId};

const TITLE: &str = "weightsync commit record 1";

/// Bytes of a record at most: the job's name is the longest part.
pub(crate) const RECORD_BYTES_MAX: u64 = 4096;

/// Where the last commit of a job is recorded.
#[derive(Debug, Clone)]
pub struct RecordFile {
    path: PathBuf,
    job: String,
}

impl RecordFile {
    /// The record of `job` at `path`, and what is in it: `None` where there is no such file yet.
    ///
    /// # Errors
    ///
    /// [`RendezvousError::Record`] for a file that cannot be read, is damaged or is another job's, and for a directory that is
    /// not there.
    pub fn open(path: impl Into<PathBuf>, job: &str) -> Result<(Self, Option<Commit>), RendezvousError> {
        let file = Self { path: path.into(), job: job.to_owned() };
        let bad = |reason: String| RendezvousError::Record { path: file.path.clone(), reason };
        if !file.directory().is_dir() {
            return Err(bad(format!("there is no directory {}", file.directory().display())));
        }
        let text = match fs::metadata(&file.path).and_then(|found| match found.len() <= RECORD_BYTES_MAX {
            true => fs::read_to_string(&file.path),
            false => Err(io::Error::other("it is too long to be one")),
        }) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((file, None)),
            Err(error) => return Err(bad(error.to_string())),
        };
        let (found, commit) = parse(&text).ok_or_else(|| {
            bad("it is damaged; if you know what every inference rank serves, remove it".into())
        })?;
        if found != job {
            return Err(bad(format!(
                "it is of the job '{found}', not '{job}'; give each job a file of its own"
            )));
        }
        Ok((file, Some(commit)))
    }

    /// Replaces the record. When this returns, it survives a power failure.
    ///
    /// # Errors
    ///
    /// The system's. The file then holds this record or the one before.
    pub fn store(&self, commit: Commit) -> io::Result<()> {
        let mut beside = self.path.clone().into_os_string();
        beside.push(".new");
        let mut file = File::create(&beside)?;
        file.write_all(text(&self.job, commit).as_bytes())?;
        file.sync_all()?;
        fs::rename(&beside, &self.path)?;
        File::open(self.directory())?.sync_all()
    }

    fn directory(&self) -> &Path {
        match self.path.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        }
    }
}

/// A commit of a job, in words and with a checksum.
pub(crate) fn text(job: &str, Commit { version, push }: Commit) -> String {
    let body = format!("{TITLE}\njob {job:?}\nversion {version}\npush {push}\n");
    let sum = blake3::hash(body.as_bytes());
    format!("{body}blake3 {sum}\n")
}

/// The job's name and its commit. A record is what [`text`] makes of them, to the byte.
pub(crate) fn parse(record: &str) -> Option<(String, Commit)> {
    let mut lines = record.lines().skip(1);
    let mut field = |name: &str| lines.next()?.strip_prefix(name)?.strip_prefix(' ');
    let quoted = field("job")?;
    let version = field("version")?.parse().ok()?;
    let push = push_id(field("push")?)?;
    let commit = Commit { version, push };
    let job = unquoted(quoted)?;
    (text(&job, commit) == record).then_some((job, commit))
}

/// Undoes what `{:?}` does to a job's name.
fn unquoted(quoted: &str) -> Option<String> {
    let inner = quoted.strip_prefix('"')?.strip_suffix('"')?;
    let mut name = String::new();
    let mut rest = inner.chars();
    while let Some(next) = rest.next() {
        if next != '\\' {
            name.push(next);
            continue;
        }
        name.push(match rest.next()? {
            'n' => '\n',
            't' => '\t',
            'r' => '\r',
            '0' => '\0',
            'u' => {
                let code: String = rest.by_ref().skip(1).take_while(|next| *next != '}').collect();
                char::from_u32(u32::from_str_radix(&code, 16).ok()?)?
            }
            plain => plain,
        });
    }
    Some(name)
}

fn push_id(hex: &str) -> Option<PushId> {
    let mut id = [0; 16];
    if hex.len() != 2 * id.len() || !hex.is_ascii() {
        return None;
    }
    for (at, byte) in id.iter_mut().enumerate() {
        *byte = u8::from_str_radix(hex.get(2 * at..2 * at + 2)?, 16).ok()?;
    }
    Some(PushId(id))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn commit(version: u64) -> Commit {
        Commit { version, push: PushId([version as u8; 16]) }
    }

    #[test]
    fn what_was_stored_is_found_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("record");
        let (file, none) = RecordFile::open(&path, "a job").unwrap();
        assert_eq!(none, None);
        for version in [1, 300, u64::MAX] {
            file.store(commit(version)).unwrap();
            assert_eq!(RecordFile::open(&path, "a job").unwrap().1, Some(commit(version)));
        }
        let other = RecordFile::open(&path, "another").unwrap_err().to_string();
        assert!(other.contains("of the job 'a job', not 'another'"), "{other}");
    }

    #[test]
    fn a_place_that_is_not_there_is_an_error_at_the_start() {
        let error = RecordFile::open("/nonexistent/record", "job").unwrap_err().to_string();
        assert!(error.contains("/nonexistent"), "{error}");
    }

    #[test]
    fn a_damaged_record_is_never_taken_for_another_or_for_none() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("record");
        let whole = text("job", commit(7));
        for at in 0..whole.len() {
            for change in [1, 32] {
                let mut bytes = whole.clone().into_bytes();
                bytes[at] ^= change;
                fs::write(&path, &bytes).unwrap();
                assert!(RecordFile::open(&path, "job").is_err(), "byte {at}");
            }
            fs::write(&path, &whole.as_bytes()[..at]).unwrap();
            assert!(RecordFile::open(&path, "job").is_err(), "cut at {at}");
        }
    }

    proptest! {
        #[test]
        fn every_name_of_a_job_comes_back(job in any::<String>(), version in any::<u64>(), push in any::<[u8; 16]>()) {
            let commit = Commit { version, push: PushId(push) };
            prop_assert_eq!(parse(&text(&job, commit)), Some((job, commit)));
        }
    }
}
