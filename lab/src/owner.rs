//! Who has a lab: a file that its owner keeps locked, so that a lab whose owner was killed is known by its free lock.
//!
//! The kernel frees the lock with the process, however that ends; a process id alone would be reused. The file says the
//! owner's process id, for people, or that the lab was left standing on purpose.

use std::fs::{self, File, TryLockError};
use std::io::{ErrorKind, Read as _, Seek as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::{LabError, LabState};

/// Where the files are. Like the namespaces' names in /run/netns, they are gone after a restart of the machine.
pub(crate) const FOLDER: &str = "/run/weightsync-lab";

/// What the file of a lab says that is to stand without an owner.
const KEPT: &str = "kept";

/// How long to wait for somebody who holds a name only to look at it or to remove what was left of it.
pub(crate) const TAKE_MAX: Duration = Duration::from_secs(2);

/// How often a lock is tried.
const POLL: Duration = Duration::from_millis(20);

/// A lab's name, taken: no other process builds or removes a lab of it.
#[derive(Debug)]
pub(crate) struct Owner {
    path: PathBuf,
    file: File,
}

impl Owner {
    /// Takes a name, and waits for it at most so long.
    pub(crate) fn take(name: &str, at_most: Duration) -> Result<Self, LabError> {
        let until = Instant::now() + at_most;
        let path = Path::new(FOLDER).join(name);
        fs::create_dir_all(FOLDER).map_err(LabError::file(Path::new(FOLDER)))?;
        loop {
            let file = File::options().create(true).truncate(false).read(true).write(true).open(&path);
            let file = file.map_err(LabError::file(&path))?;
            match file.try_lock() {
                Ok(()) if is_at(&file, &path) => return Ok(Self { path, file }),
                // Removed by the one who had it before, between our opening and our locking: once more.
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(source)) => return Err(LabError::file(&path)(source)),
            }
            if Instant::now() >= until {
                return Err(LabError::InUse { name: name.to_owned(), process: process_of(&file) });
            }
            std::thread::sleep(POLL);
        }
    }

    /// Whether the lab was left standing on purpose.
    pub(crate) fn is_kept(&self) -> Result<bool, LabError> {
        Ok(text_of(&self.file).map_err(LabError::file(&self.path))? == KEPT)
    }

    /// Writes this process's id into the file.
    pub(crate) fn sign(&self) -> Result<(), LabError> {
        self.write(&std::process::id().to_string())
    }

    /// Notes that the lab stands without an owner.
    pub(crate) fn note_kept(&self) -> Result<(), LabError> {
        self.write(KEPT)
    }

    fn write(&self, text: &str) -> Result<(), LabError> {
        let mut file = &self.file;
        let written =
            file.set_len(0).and_then(|()| file.rewind()).and_then(|()| file.write_all(text.as_bytes()));
        written.map_err(LabError::file(&self.path))
    }

    /// Gives the name back; nothing remains of it.
    pub(crate) fn remove(self) -> Result<(), LabError> {
        fs::remove_file(&self.path).map_err(LabError::file(&self.path))
    }
}

/// How a name stands, without taking it. `None` where it has no file.
pub(crate) fn look(name: &str) -> Option<LabState> {
    let file = File::open(Path::new(FOLDER).join(name)).ok()?;
    if text_of(&file).is_ok_and(|text| text == KEPT) {
        return Some(LabState::Kept);
    }
    // Shared, so that those who only look do not see each other.
    match file.try_lock_shared() {
        Ok(()) => Some(LabState::LeftOver),
        Err(_) => Some(LabState::InUse(process_of(&file))),
    }
}

/// The names that have a file.
pub(crate) fn names() -> Vec<String> {
    let entries = fs::read_dir(FOLDER).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::metadata(path)) {
        (Ok(ours), Ok(there)) => (ours.dev(), ours.ino()) == (there.dev(), there.ino()),
        _ => false,
    }
}

fn text_of(mut file: &File) -> std::io::Result<String> {
    // More than any process id or word of ours.
    const TEXT_BYTES_MAX: u64 = 64;
    let mut text = String::new();
    file.rewind()?;
    match file.take(TEXT_BYTES_MAX).read_to_string(&mut text) {
        Err(error) if error.kind() != ErrorKind::InvalidData => Err(error),
        _ => Ok(text.trim().to_owned()),
    }
}

fn process_of(file: &File) -> Option<u32> {
    text_of(file).ok()?.parse().ok()
}
