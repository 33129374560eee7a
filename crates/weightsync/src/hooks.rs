//! What an engine does around a version.

/// See [`Hooks::before_change`].
pub type BeforeChange = Box<dyn FnMut(u64) -> Result<(), String> + Send>;

/// See [`Hooks::after_commit`].
pub type AfterCommit = Box<dyn FnMut(u64, *mut u8) -> Result<(), String> + Send>;

/// See [`Hooks::after_abort`].
pub type AfterAbort = Box<dyn FnMut(u64, &str) + Send>;

/// What an engine does when the weights change. All are called on the task that waits for versions, one at a time, and may
/// block: heartbeats go out meanwhile, and the job's deadline is how long the others wait.
#[derive(Default)]
pub struct Hooks {
    /// Before the bytes that are served change, with the version that is to come: stop reading them. In place that is when a
    /// push begins, otherwise when it is to be committed. An error aborts the push in place; otherwise the decision has been
    /// taken, this rank is lost to the job, and its session gives out no bytes any more.
    pub before_change: Option<BeforeChange>,
    /// After a commit, with the version and the address of the weights: flush caches, derive what is derived from weights, read
    /// them again. The trainers hear that this rank serves the version when this returns; after an error this rank is lost to
    /// the job.
    pub after_commit: Option<AfterCommit>,
    /// After a push that ended without a commit, with its version and the reason. In place the bytes are of no version, and stay
    /// so until the next commit; otherwise they have not changed.
    pub after_abort: Option<AfterAbort>,
}

impl Hooks {
    pub(crate) fn stop(&mut self, version: u64) -> Result<(), String> {
        self.before_change.as_mut().map_or(Ok(()), |hook| hook(version))
    }

    pub(crate) fn go_on(&mut self, version: u64, weights: *mut u8) -> Result<(), String> {
        self.after_commit.as_mut().map_or(Ok(()), |hook| hook(version, weights))
    }

    pub(crate) fn aborted(&mut self, version: u64, reason: &str) {
        if let Some(hook) = &mut self.after_abort {
            hook(version, reason);
        }
    }
}
