//! Bytes as what a process of the same user says to the socket that hands out shared memory, and as what such a socket
//! answers.

#![no_main]

use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::LazyLock;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use xfer_exec::local::{Doorman, DoormanAddress, KEY_BYTES, SharedFile, fetch};

static DOORMAN: LazyLock<Doorman> = LazyLock::new(|| {
    let (_, file) = SharedFile::create(4096).unwrap();
    Doorman::open(vec![file]).unwrap().0
});

/// A socket that says what it is told to. Its thread stays: one for each run looks like a leak while it ends.
static LIAR: LazyLock<(Sender<Vec<u8>>, DoormanAddress)> = LazyLock::new(|| {
    let name = format!("weightsync-fuzz-{}", std::process::id());
    let listener = UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
    let (sender, words) = channel::<Vec<u8>>();
    std::thread::spawn(move || {
        for words in words {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.write_all(&words);
        }
    });
    (sender, DoormanAddress { name, key: [0; KEY_BYTES] })
});

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let address = DOORMAN.address();
    let socket = SocketAddr::from_abstract_name(&address.name).unwrap();
    // Half of them know the key: what is left to be wrong is the region.
    let knows = bytes.first().is_some_and(|byte| byte % 2 == 0);
    let mut request = if knows { address.key.to_vec() } else { Vec::new() };
    request.extend(bytes.get(1..).unwrap_or_default());
    let mut stream = UnixStream::connect_addr(&socket).unwrap();
    // It may have hung up after the bytes that it wanted.
    let _ = stream.write_all(&request);
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    // The only region, or where to say what has arrived.
    let region = request.get(KEY_BYTES..KEY_BYTES + 4);
    let granted = knows && (region == Some(&[0; 4]) || region == Some(&[0xff; 4]));
    assert_eq!(!answer.is_empty(), granted, "{answer:?}");

    let (liar, address) = &*LIAR;
    liar.send(bytes.to_vec()).unwrap();
    assert!(fetch(address, 0, Duration::from_secs(5)).is_err(), "there was no file to be had");
});
