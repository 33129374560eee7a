//! Compiled kernels on disk.
//!
//! A file is named by a digest of all that its contents follow from, holds a digest of its contents, and appears whole:
//! it is written beside its place and renamed. Two processes may write the same file; either's is right.

use std::fs;
use std::path::{Path, PathBuf};

use crate::driver::Version;

/// Part of every key. To be counted up when the options that this crate adds, or the file's form, change.
const FORM: &str = "weightsync cubin 1";

/// The bytes of the digest in front of the contents.
const DIGEST_BYTES: usize = 32;

/// A folder of compiled kernels.
pub(super) struct Cache {
    folder: PathBuf,
}

/// What a compilation follows from, as a file name. The options name the architecture.
pub(super) fn key(source: &str, options: &[String], version: Version) -> String {
    let mut hasher = blake3::Hasher::new();
    let mut part = |text: &str| {
        // Lengths first: parts must not run into each other.
        hasher.update(&(text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    };
    part(FORM);
    part(&version.to_string());
    part(source);
    options.iter().for_each(|option| part(option));
    format!("{}.cubin", hasher.finalize().to_hex())
}

impl Cache {
    /// The user's, or none where no folder is known.
    pub(super) fn of_user() -> Option<Self> {
        let variable =
            |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let base = variable("XDG_CACHE_HOME").or_else(|| variable("HOME").map(|home| home.join(".cache")))?;
        // A relative path would be another folder for every working directory.
        base.is_absolute().then(|| Self { folder: base.join("weightsync") })
    }

    /// What was kept, if it is whole.
    pub(super) fn read(&self, key: &str) -> Option<Vec<u8>> {
        let file = fs::read(self.folder.join(key)).ok()?;
        let (digest, contents) = file.split_at_checked(DIGEST_BYTES)?;
        let whole = blake3::hash(contents).as_bytes().as_slice() == digest;
        if !whole {
            tracing::warn!(key, "a kept kernel is damaged; compiling again");
        }
        whole.then(|| contents.to_vec())
    }

    /// Keeps it, if that is possible.
    pub(super) fn write(&self, key: &str, contents: &[u8]) {
        if let Err(error) = self.try_write(key, contents) {
            tracing::debug!(folder = %self.folder.display(), %error, "a compiled kernel is not kept");
        }
    }

    fn try_write(&self, key: &str, contents: &[u8]) -> std::io::Result<()> {
        fs::create_dir_all(&self.folder)?;
        let beside = self.folder.join(format!("{key}.{}", std::process::id()));
        let written = fs::write(&beside, [blake3::hash(contents).as_bytes().as_slice(), contents].concat())
            .and_then(|()| fs::rename(&beside, self.folder.join(key)));
        if written.is_err() {
            remove(&beside);
        }
        written
    }
}

/// Removes what is of no use; it may not be there.
fn remove(path: &Path) {
    if let Err(error) = fs::remove_file(path) {
        tracing::debug!(path = %path.display(), %error, "not removed");
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    type Parts = (String, Vec<String>, (u32, u32));

    fn parts() -> impl Strategy<Value = Parts> {
        ("[ab]{0,3}", vec("[ab]{0,2}", 0..3), (12..14_u32, 0..2_u32))
    }

    fn key_of((source, options, (major, minor)): &Parts) -> String {
        key(source, options, Version { major: *major, minor: *minor })
    }

    proptest! {
        #[test]
        fn keys_are_equal_when_all_parts_are(all in vec(parts(), 1..30)) {
            let different: HashSet<&Parts> = all.iter().collect();
            let keys: HashSet<String> = all.iter().map(key_of).collect();
            prop_assert_eq!(keys.len(), different.len());
            prop_assert_eq!(key_of(&all[0]), key_of(&all[0].clone()));
        }

        #[test]
        fn what_was_kept_comes_back_or_nothing_does(contents in vec(any::<u8>(), 0..100), cut in 0..140_usize, flip in 0..132_usize) {
            let folder = tempfile::tempdir().unwrap();
            let cache = Cache { folder: folder.path().join("deep/er") };
            prop_assert_eq!(cache.read("k"), None);
            cache.write("k", &contents);
            prop_assert_eq!(cache.read("k"), Some(contents.clone()));
            let path = cache.folder.join("k");
            prop_assert_eq!(fs::read_dir(&cache.folder).unwrap().count(), 1, "nothing is left beside it");

            let whole = fs::read(&path).unwrap();
            if cut < whole.len() {
                fs::write(&path, &whole[..cut]).unwrap();
                prop_assert_eq!(cache.read("k"), None);
            }
            let mut damaged = whole;
            let at = flip % damaged.len();
            damaged[at] ^= 1;
            fs::write(&path, &damaged).unwrap();
            prop_assert_eq!(cache.read("k"), None);
            cache.write("k", &contents);
            prop_assert_eq!(cache.read("k"), Some(contents));
        }
    }

    #[test]
    fn a_folder_that_cannot_be_made_fails_nothing() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let cache = Cache { folder: file.path().join("below a file") };
        cache.write("k", b"x");
        assert_eq!(cache.read("k"), None);
    }
}
