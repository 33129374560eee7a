//! A process that exits while its GPU memory is being freed ends as it wants to, and not by a signal.

mod common;

use std::process::{Command, exit};

use common::device;

/// Set for the process that exits.
const CHILD: &str = "GPU_MEM_TEST_EXITS";

/// Enough for the thread that frees to be at it when the process ends.
const BUFFERS: usize = 500;

#[test]
fn a_process_may_exit_while_memory_is_freed() {
    let Some(device) = device() else { return };
    if std::env::var_os(CHILD).is_some() {
        let buffers: Vec<_> = (0..BUFFERS).map(|_| device.alloc(1 << 20).unwrap()).collect();
        drop(buffers);
        exit(0);
    }
    for _ in 0..5 {
        let mut child = Command::new(std::env::current_exe().unwrap());
        let status =
            child.arg("a_process_may_exit_while_memory_is_freed").env(CHILD, "1").output().unwrap().status;
        assert!(status.success(), "{status}");
    }
}
