//! The thread that hashes for a session, as long as it lives.
//!
//! It is one, and not one of a runtime's pool: on a busy host a push may begin before the pool has its last thread back. Then
//! another starts, with a heap of its own, and what a rank holds moves from push to push.

use std::io;
use std::sync::mpsc::{self, Sender};

type Task = Box<dyn FnOnce() + Send>;

/// See the module. The thread ends when this is dropped, after what it was given.
pub(super) struct Worker(Sender<Task>);

impl Worker {
    pub(super) fn start() -> io::Result<Self> {
        let (sender, tasks) = mpsc::channel::<Task>();
        std::thread::Builder::new()
            .name("hash".into())
            .spawn(move || tasks.iter().for_each(|task| task()))?;
        Ok(Self(sender))
    }

    /// Does this after what it was given before: tasks of pushes that were given up, which end early.
    pub(super) fn run(&self, task: impl FnOnce() + Send + 'static) {
        // Nobody is there after a task that panicked. Then the task is dropped, and with it what it would answer with.
        let _ = self.0.send(Box::new(task));
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::thread;

    use super::*;

    #[test]
    fn tasks_that_overlap_take_one_thread_in_turn() {
        let worker = Worker::start().unwrap();
        let (go, wait) = mpsc::channel::<()>();
        let (said, heard) = mpsc::channel();
        let first = said.clone();
        worker.run(move || {
            let _ = wait.recv();
            first.send((1, thread::current().id())).unwrap();
        });
        worker.run(move || said.send((2, thread::current().id())).unwrap());
        // On a thread of its own the second would end before the first is let go.
        drop(go);
        let answers: Vec<_> = heard.iter().collect();
        assert_eq!(answers.iter().map(|(number, _)| *number).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(answers[0].1, answers[1].1);
    }

    /// Says that its thread has ended.
    struct Farewell(Sender<()>);

    impl Drop for Farewell {
        fn drop(&mut self) {
            self.0.send(()).unwrap();
        }
    }

    #[test]
    fn the_thread_ends_with_its_worker() {
        thread_local!(static FAREWELL: RefCell<Option<Farewell>> = const { RefCell::new(None) });
        let worker = Worker::start().unwrap();
        let (said, heard) = mpsc::channel();
        worker.run(move || FAREWELL.with_borrow_mut(|farewell| *farewell = Some(Farewell(said))));
        drop(worker);
        heard.recv().unwrap();
    }
}
