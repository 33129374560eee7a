//! Looks at what an inference rank serves, again and again while the session takes part in pushes.
//!
//! It reads the arena as an engine does that has its address, and only believes a look during which the rank served one version
//! from beginning to end: what is served is taken from the session's metrics, before and after. It must never touch the session.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use weightsync::metrics::Metrics;

use super::weights::{Expected, tensors};

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

/// The memory of one parameter in this process.
pub(super) struct Place {
    pub(super) address: u64,
    pub(super) bytes: usize,
}

/// See the module. Ends with the session's arena, at the latest.
pub(super) struct Eye {
    stop: Arc<AtomicBool>,
    looking: JoinHandle<()>,
}

impl Eye {
    /// `wrong` is told what must not be.
    pub(super) fn open(
        inference: u32,
        places: Vec<Place>,
        metrics: Metrics,
        record: PathBuf,
        seen: Arc<Seen>,
        wrong: impl FnOnce(String) + Send + 'static,
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let ends = stop.clone();
        let looking = std::thread::spawn(move || {
            let moment =
                || Moment::of(&metrics.text(), inference).context("the metrics do not say what is served");
            if let Err(reason) = look_until(&ends, inference, &places, moment, &record, &seen) {
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
    moment: impl Fn() -> anyhow::Result<Moment>,
    record: &Path,
    seen: &Seen,
) -> anyhow::Result<()> {
    let memory = File::open("/proc/self/mem").context("its own memory")?;
    let mut found: Vec<Vec<u8>> = places.iter().map(|place| vec![0; place.bytes]).collect();
    let mut expected = Expected::new(0, inference);
    while !stop.load(Ordering::Relaxed) {
        let began = Instant::now();
        let before = moment()?;
        let version = before.version;
        if before.is_served() {
            if version != expected.version() {
                was_committed(version, record)?;
                expected = Expected::new(version, inference);
            }
            for (place, found) in places.iter().zip(&mut found) {
                memory.read_exact_at(found, place.address).context("its own memory")?;
            }
            if moment()? == before {
                for (tensor, found) in tensors().zip(&found) {
                    expected
                        .compare(tensor, found)
                        .map_err(anyhow::Error::msg)
                        .context("a look at the arena")?;
                    seen.bytes.fetch_add(found.len() as u64, Ordering::Relaxed);
                }
                seen.looks.fetch_add(1, Ordering::Relaxed);
            }
        }
        std::thread::sleep(PAUSE_MIN.max(began.elapsed() * PAUSE_TIMES));
    }
    Ok(())
}

/// What an inference rank serves, as its metrics say.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Moment {
    version: u64,
    torn: bool,
    /// Attempts that have ended: the same version may have been torn in between.
    attempts: u64,
}

impl Moment {
    fn of(page: &str, inference: u32) -> Option<Self> {
        let rank = format!("rank=\"{inference}\"");
        let values = |name: &str| {
            let of_name = |line: &&str| line.starts_with(name) && line.contains(&rank);
            let value = |line: &str| line.rsplit_once(' ')?.1.parse::<u64>().ok();
            page.lines().filter(of_name).map(value).collect::<Option<Vec<u64>>>()
        };
        Some(Self {
            version: *values("weightsync_version{")?.first()?,
            torn: *values("weightsync_torn{")?.first()? != 0,
            attempts: values("weightsync_pushes_total{")?.iter().sum(),
        })
    }

    fn is_served(&self) -> bool {
        self.version > 0 && !self.torn
    }
}

/// Fails unless the controller has recorded the commit of this version, or of a newer one.
pub(super) fn was_committed(version: u64, record: &Path) -> anyhow::Result<()> {
    let recorded = recorded(record)?;
    if recorded < version {
        bail!("version {version} is served, but the record says that {recorded} is committed");
    }
    Ok(())
}

/// The version of a controller's record; 0 where there is none yet.
pub(super) fn recorded(record: &Path) -> anyhow::Result<u64> {
    let text = match std::fs::read_to_string(record) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(error).context("the record"),
    };
    let version =
        text.lines().find_map(|line| line.strip_prefix("version ")).context("no version in the record")?;
    Ok(version.parse()?)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::torture::weights::{fill, spec};

    const PAGE: &str = r#"
weightsync_pushes_total{side="inference",rank="0",result="committed"} VERSION
weightsync_pushes_total{side="inference",rank="0",result="failed"} 3
weightsync_pushes_total{side="inference",rank="1",result="failed"} 9
weightsync_version{side="inference",rank="0"} VERSION
weightsync_torn{side="inference",rank="0"} TORN
"#;

    #[test]
    fn what_is_served_is_read_from_the_metrics() {
        let page = |version: &str, torn: &str| PAGE.replace("VERSION", version).replace("TORN", torn);
        let moment = Moment::of(&page("17", "0"), 0).unwrap();
        assert_eq!((moment.version, moment.torn, moment.attempts, moment.is_served()), (17, false, 20, true));
        assert!(!Moment::of(&page("17", "1"), 0).unwrap().is_served());
        assert!(!Moment::of(&page("0", "0"), 0).unwrap().is_served());
        assert_eq!(Moment::of(&page("17", "0"), 2), None);
        assert_eq!(Moment::of(&page("x", "0"), 0), None);
    }

    #[test]
    fn a_version_is_committed_when_the_record_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let record = folder.path().join("commit");
        assert!(was_committed(1, &record).is_err());
        std::fs::write(&record, "weightsync commit record 1\njob \"default\"\nversion 12\npush 00\n")
            .unwrap();
        was_committed(12, &record).unwrap();
        let error = was_committed(13, &record).unwrap_err().to_string();
        assert_eq!(error, "version 13 is served, but the record says that 12 is committed");
        std::fs::write(&record, "half").unwrap();
        assert!(was_committed(1, &record).is_err());
    }

    /// An arena, looked at while the rank says these things in turn, the last of them for good; how many looks were compared.
    fn look(arena: &[Vec<u8>], says: &[Moment]) -> anyhow::Result<u64> {
        let folder = tempfile::tempdir()?;
        let record = folder.path().join("commit");
        std::fs::write(&record, "weightsync commit record 1\nversion 9\n")?;
        let place = |bytes: &Vec<u8>| Place { address: bytes.as_ptr() as u64, bytes: bytes.len() };
        let places: Vec<Place> = arena.iter().map(place).collect();
        let (stop, seen, asked) = (AtomicBool::new(false), Seen::default(), Cell::new(0));
        let moment = || {
            let number = asked.replace(asked.get() + 1);
            stop.store(number + 1 >= says.len(), Ordering::Relaxed);
            Ok(says[number.min(says.len() - 1)])
        };
        look_until(&stop, 0, &places, moment, &record, &seen)?;
        let (looks, bytes) = (seen.looks.into_inner(), seen.bytes.into_inner());
        assert_eq!(bytes, looks * arena.iter().map(|bytes| bytes.len() as u64).sum::<u64>());
        Ok(looks)
    }

    #[test]
    fn one_wrong_byte_is_seen_in_what_is_served_from_beginning_to_end() {
        let served = |version| Moment { version, torn: false, attempts: 5 };
        let (torn, later) = (Moment { torn: true, ..served(9) }, Moment { attempts: 7, ..served(9) });
        let right: Vec<Vec<u8>> = tensors()
            .map(|tensor| {
                let mut bytes = vec![0; spec(tensor).unwrap().bytes().unwrap() as usize];
                fill(9, tensor, &mut bytes);
                bytes
            })
            .collect();
        let mut wrong = right.clone();
        wrong[1][4711] ^= 1;

        assert_eq!(look(&right, &[served(9), served(9), served(9), served(9)]).unwrap(), 2);
        let error = format!("{:#}", look(&wrong, &[served(9), served(9)]).unwrap_err());
        assert!(error.contains("w.1[1, 615]"), "{error}");
        let error = format!("{:#}", look(&right, &[served(8), served(8)]).unwrap_err());
        assert!(error.contains("the row is of version 9"), "{error}");
        let error = look(&right, &[served(10), served(10)]).unwrap_err().to_string();
        assert!(error.contains("the record says that 9"), "{error}");
        // Nothing is said of what was not served for the whole look.
        for says in [
            [torn, torn],
            [served(0), served(0)],
            [served(9), torn],
            [served(9), later],
            [served(9), served(10)],
        ] {
            assert_eq!(look(&wrong, &says).unwrap(), 0);
        }
    }
}
