//! Who is in a network namespace, or about to enter it, and an end to them.
//!
//! `ip netns exec` opens the namespace's file, enters, and becomes the program that it was given. Between the first two it
//! is in no list of `ip netns pids`, and it enters even when the name has gone. So a namespace is known here by its
//! file (device and inode), with or without a name.
//!
//! It must never kill this process, nor one that merely holds such a file and is not `ip`.

use std::fs::{self, File, Metadata};
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use crate::{LabError, shell};

/// A network namespace by its open file. While that is open no other namespace gets its inode.
pub(crate) struct OpenNamespace {
    file: Metadata,
    _open: File,
}

impl OpenNamespace {
    /// Opens the file of a namespace; `None` where there is none.
    pub(crate) fn open(path: &Path) -> Result<Option<Self>, LabError> {
        let opened = File::open(path).and_then(|open| Ok(Self { file: open.metadata()?, _open: open }));
        match opened {
            Ok(namespace) => Ok(Some(namespace)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(LabError::file(path)(error)),
        }
    }

    /// Kills who is in it or about to enter it, without waiting for their end; whether there was anybody.
    pub(crate) fn kill_all(&self) -> Result<bool, LabError> {
        let found = self.occupants().map_err(LabError::file(Path::new("/proc")))?;
        if !found.is_empty() {
            let found: Vec<&str> = found.iter().map(String::as_str).collect();
            // Those that have ended in between make it fail, which is what was wanted.
            drop(shell::run("sh", &[&["-c", "kill -9 \"$@\"", "sh"], &found[..]].concat()));
        }
        Ok(!found.is_empty())
    }

    /// The ids of these processes.
    fn occupants(&self) -> io::Result<Vec<String>> {
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc")? {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            let Ok(id) = name.parse::<u32>() else { continue };
            let process = entry.path();
            // In this order: one that enters between the two looks is seen by the second.
            let occupies = || self.is_about_to_enter(&process) || self.is_at(&process.join("ns/net"));
            if id != std::process::id() && occupies() {
                found.push(name);
            }
        }
        Ok(found)
    }

    /// Whether a process is `ip` and has the file open. One that has ended is not.
    fn is_about_to_enter(&self, process: &Path) -> bool {
        let is_ip = fs::read(process.join("comm")).is_ok_and(|name| name == b"ip\n");
        let mut open = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
        is_ip && open.any(|file| self.is_at(&file.path()))
    }

    /// Whether a path leads to this namespace. That of a process that has ended, also of a zombie, leads nowhere.
    fn is_at(&self, path: &Path) -> bool {
        fs::metadata(path).is_ok_and(|found| (found.dev(), found.ino()) == (self.file.dev(), self.file.ino()))
    }
}
