//! Looks at what an inference rank serves, again and again while its session takes part in pushes.
//!
//! It reads the arena as an engine does that was told its address ([`Hooks`]), and only believes a look during which one version
//! was served from beginning to end. It must never touch the session, and holds up nobody.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use weightsync::Hooks;

use super::weights::{Expected, tensors};
use crate::job::locked;

/// Between two looks at least, and by how many times of what a look takes: so that looking leaves cores to the job.
const PAUSE_MIN: Duration = Duration::from_millis(4);
const PAUSE_TIMES: u32 = 4;

/// What was seen so far.
#[derive(Default)]
pub(super) struct Seen {
    /// Bytes that were compared, and were right.
    pub(super) bytes: AtomicU64,
    /// Looks at a version that was served.
    pub(super) looks: AtomicU64,
}

/// A parameter in the arena.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) offset: u64,
    pub(super) bytes: usize,
}

/// What an engine may read.
#[derive(Debug, Default, Clone, Copy, PartialEq)]
struct Served {
    /// The version, and the arena's address.
    now: Option<(u64, u64)>,
    /// How often that has changed.
    changes: u64,
}

/// What hooks were told last.
#[derive(Default, Clone)]
pub(super) struct Told(Arc<Mutex<Served>>);

impl Told {
    pub(super) fn hooks(&self) -> Hooks {
        let (before, after) = (self.clone(), self.clone());
        Hooks {
            before_change: Some(Box::new(move |_| {
                before.is(None);
                Ok(())
            })),
            after_commit: Some(Box::new(move |version, weights| {
                after.is(Some((version, weights as u64)));
                Ok(())
            })),
            after_abort: None,
        }
    }

    fn is(&self, now: Option<(u64, u64)>) {
        let mut served = locked(&self.0);
        *served = Served { now, changes: served.changes + 1 };
    }

    fn served(&self) -> Served {
        *locked(&self.0)
    }
}

/// See the module. Is closed before the session goes.
pub(super) struct Eye {
    stop: Arc<AtomicBool>,
    looking: JoinHandle<()>,
}

impl Eye {
    /// `wrong` is told what must not be.
    pub(super) fn open(
        inference: u32,
        places: Vec<Place>,
        told: Told,
        record: PathBuf,
        seen: Arc<Seen>,
        wrong: impl FnOnce(String) + Send + 'static,
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let ends = stop.clone();
        let looking = std::thread::spawn(move || {
            let served = || told.served();
            if let Err(reason) = look_until(&ends, inference, &places, served, &record, &seen) {
                wrong(format!("{reason:#}"));
            }
        });
        Self { stop, looking }
    }

    /// Returns when nothing is read any more.
    pub(super) fn close(self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.looking.join();
    }
}

fn look_until(
    stop: &AtomicBool,
    inference: u32,
    places: &[Place],
    served: impl Fn() -> Served,
    record: &Path,
    seen: &Seen,
) -> anyhow::Result<()> {
    // An address is all that an engine has; this way nothing here can be wrong but an answer.
    let memory = File::open("/proc/self/mem").context("its own memory")?;
    let mut found: Vec<Vec<u8>> = places.iter().map(|place| vec![0; place.bytes]).collect();
    let mut expected = Expected::new(0, inference);
    while !stop.load(Ordering::Relaxed) {
        let (began, before) = (Instant::now(), served());
        if let Some((version, address)) = before.now {
            if version != expected.version() {
                was_committed(version, record)?;
                expected = Expected::new(version, inference);
            }
            for (place, found) in places.iter().zip(&mut found) {
                memory.read_exact_at(found, address + place.offset).context("its own memory")?;
            }
            if served() == before {
                for (tensor, found) in tensors().zip(&found) {
                    expected.compare(tensor, found).map_err(anyhow::Error::msg).context("in the arena")?;
                    seen.bytes.fetch_add(found.len() as u64, Ordering::Relaxed);
                }
                seen.looks.fetch_add(1, Ordering::Relaxed);
            }
        }
        std::thread::sleep(PAUSE_MIN.max(began.elapsed() * PAUSE_TIMES));
    }
    Ok(())
}

/// Fails unless the controller has recorded the commit of this version, or of a newer one.
pub(super) fn was_committed(version: u64, record: &Path) -> anyhow::Result<()> {
    match recorded(record)? {
        // The record is there before anybody hears of a commit: where it is not, nobody knows what was decided.
        None => {
            let record = record.display();
            bail!(
                "version {version} is served, and this run cannot judge that: there is no {record}; was it removed?"
            );
        }
        Some(recorded) if recorded < version => {
            bail!("version {version} is served, but the record says that {recorded} is committed");
        }
        Some(_) => Ok(()),
    }
}

/// The version of a controller's record; `None` where there is no such file.
pub(super) fn recorded(record: &Path) -> anyhow::Result<Option<u64>> {
    let text = match std::fs::read_to_string(record) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).context("the record"),
    };
    let version =
        text.lines().find_map(|line| line.strip_prefix("version ")).context("no version in the record")?;
    Ok(Some(version.parse()?))
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::torture::weights::{fill, spec};

    #[test]
    fn a_version_is_committed_when_the_record_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let record = folder.path().join("commit");
        let error = was_committed(1, &record).unwrap_err().to_string();
        assert!(error.contains("this run cannot judge"), "{error}");
        std::fs::write(&record, "weightsync commit record 1\njob \"default\"\nversion 12\npush 00\n")
            .unwrap();
        was_committed(12, &record).unwrap();
        let error = was_committed(13, &record).unwrap_err().to_string();
        assert_eq!(error, "version 13 is served, but the record says that 12 is committed");
        std::fs::write(&record, "half").unwrap();
        assert!(was_committed(1, &record).is_err());
    }

    #[test]
    fn hooks_say_what_may_be_read() {
        let told = Told::default();
        let Hooks { before_change: Some(mut before), after_commit: Some(mut after), .. } = told.hooks()
        else {
            panic!()
        };
        let mut byte = 0;
        after(7, &mut byte).unwrap();
        let first = told.served();
        assert_eq!(first.now, Some((7, (&raw const byte) as u64)));
        before(8).unwrap();
        assert_eq!(told.served().now, None);
        after(7, &mut byte).unwrap();
        assert!(told.served().now == first.now && told.served() != first);
    }

    /// Looks at an arena while the rank serves this at first, and then that; how many looks were compared.
    fn look(arena: &[u8], first: Served, then: Served) -> anyhow::Result<u64> {
        let folder = tempfile::tempdir()?;
        let record = folder.path().join("commit");
        std::fs::write(&record, "weightsync commit record 1\nversion 9\n")?;
        let bytes = arena.len() / tensors().len();
        let places: Vec<Place> =
            (0..tensors().len()).map(|at| Place { offset: (at * bytes) as u64, bytes }).collect();
        let (stop, seen, asked) = (AtomicBool::new(false), Seen::default(), Cell::new(0));
        let served = || {
            stop.store(asked.get() > 0, Ordering::Relaxed);
            if asked.replace(asked.get() + 1) == 0 { first } else { then }
        };
        look_until(&stop, 0, &places, served, &record, &seen)?;
        let (looks, compared) = (seen.looks.into_inner(), seen.bytes.into_inner());
        assert_eq!(compared, looks * arena.len() as u64);
        Ok(looks)
    }

    #[test]
    fn one_wrong_byte_is_seen_in_what_is_served_from_beginning_to_end() {
        let bytes = spec(0).unwrap().bytes().unwrap() as usize;
        let mut right = vec![0; bytes * tensors().len()];
        right.chunks_mut(bytes).zip(tensors()).for_each(|(into, tensor)| fill(9, tensor, into));
        let mut wrong = right.clone();
        wrong[bytes + 4711] ^= 1;
        let served =
            |arena: &[u8], version| Served { now: Some((version, arena.as_ptr() as u64)), changes: 5 };
        let always = |arena: &[u8], version| look(arena, served(arena, version), served(arena, version));

        assert_eq!(always(&right, 9).unwrap(), 1);
        let error = format!("{:#}", always(&wrong, 9).unwrap_err());
        assert!(error.contains("w.1[1, 615]"), "{error}");
        let error = format!("{:#}", always(&right, 8).unwrap_err());
        assert!(error.contains("the row is of version 9"), "{error}");
        let error = always(&right, 10).unwrap_err().to_string();
        assert!(error.contains("the record says that 9"), "{error}");
        // Nothing is said of what was not served for the whole look.
        let now = served(&wrong, 9);
        for other in [Served { now: None, ..now }, Served { changes: 7, ..now }, served(&wrong, 10)] {
            assert_eq!(look(&wrong, now, other).unwrap(), 0);
        }
        let none = Served { now: None, ..now };
        assert_eq!(look(&wrong, none, none).unwrap(), 0);
    }
}
