//! What a job left in /dev/shm.

use std::collections::BTreeSet;
use std::fs;

/// What is there before a job starts.
pub(crate) struct SharedMemory(BTreeSet<String>);

impl SharedMemory {
    pub(crate) fn now() -> Self {
        let entries = fs::read_dir("/dev/shm").into_iter().flatten().flatten();
        Self(entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
    }

    /// What has come since then and is of these processes. Other programs use /dev/shm too: what is of a job carries the
    /// product's name, or the number of the process that made it.
    pub(crate) fn left_by(&self, pids: &[u32]) -> Vec<String> {
        let ours = |name: &&String| {
            let numbers = name.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok());
            name.contains("weightsync") || numbers.into_iter().any(|number: u32| pids.contains(&number))
        };
        Self::now().0.difference(&self.0).filter(ours).cloned().collect()
    }
}
