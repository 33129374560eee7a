//! A receiver in a process of its own: this test binary again, running one test that does nothing otherwise.

use std::any::Any;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex};

use gpu_mem::Cuda;
use weight_ops::cuda::DeviceRange;
use xfer_exec::cuda::{DeviceRegion, expose};
use xfer_exec::local::DoormanAddress;

use crate::gpu::Gpu;

/// The lengths of a receiver's regions. The last ends inside a page.
pub(crate) const REGION_BYTES: [u64; 2] = [40 << 20, (3 << 20) + 12_345];

/// Memory shared by descriptors.
pub(crate) const MAPPED: &str = "mapped";
/// Memory shared by legacy handles.
pub(crate) const HANDLE: &str = "handle";

/// What is in memory that nobody has written to.
const POISON: u8 = 0xa5;

/// Where the child finds how to share its memory, and on which GPU.
const KIND: &str = "XFER_EXEC_TEST_RECEIVER";
const ON: &str = "XFER_EXEC_TEST_ON";

/// Before what the child has to say; libtest writes to its output too.
const SAYS: &str = "RECEIVER ";

/// What a receiver's regions hold at first.
pub(crate) fn fresh() -> Vec<Vec<u8>> {
    REGION_BYTES.iter().map(|bytes| vec![POISON; *bytes as usize]).collect()
}

pub(crate) struct Peer {
    child: Child,
    pub(crate) address: DoormanAddress,
    talk: Mutex<(ChildStdin, BufReader<ChildStdout>)>,
}

impl Peer {
    pub(crate) fn start(kind: &str, gpu: u32) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["peer::receiver", "--exact", "--nocapture", "--test-threads=1"]);
        command.env(KIND, kind).env(ON, gpu.to_string()).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let said = hear(&mut output);
        let (name, key) = said.split_once(' ').unwrap();
        let key: Vec<u8> =
            (0..16).map(|at| u8::from_str_radix(&key[2 * at..2 * at + 2], 16).unwrap()).collect();
        let address = DoormanAddress { name: name.into(), key: key.try_into().unwrap() };
        let talk = Mutex::new((child.stdin.take().unwrap(), output));
        Self { child, address, talk }
    }

    /// The bytes of all regions, as the receiver's GPU reads them.
    pub(crate) fn regions(&self) -> Vec<Vec<u8>> {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (input, output) = &mut *self.talk.lock().unwrap();
        writeln!(input, "{}", file.path().display()).unwrap();
        assert_eq!(hear(output), "dumped");
        let mut bytes = std::fs::read(file.path()).unwrap();
        let second = bytes.split_off(REGION_BYTES[0] as usize);
        vec![bytes, second]
    }

    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn hear(output: &mut BufReader<ChildStdout>) -> String {
    loop {
        let mut line = String::new();
        assert!(output.read_line(&mut line).unwrap() > 0, "the receiver has ended");
        if let Some(at) = line.find(SAYS) {
            return line[at + SAYS.len()..].trim().to_owned();
        }
    }
}

/// The child's half; without a parent it does nothing.
#[test]
fn receiver() {
    let Ok(kind) = std::env::var(KIND) else { return };
    let on = std::env::var(ON).unwrap().parse().unwrap();
    let gpu = Gpu::on(&Cuda::open().unwrap().device(on).unwrap());
    let mut shared = Vec::new();
    let regions: Vec<DeviceRange> = REGION_BYTES
        .iter()
        .map(|&bytes| {
            if kind == MAPPED {
                let memory = Arc::new(gpu.device.alloc_vmm(bytes, 8 << 20).unwrap());
                shared.push(DeviceRegion::mapped(&memory).unwrap());
                DeviceRange::whole(&memory)
            } else {
                let memory = Arc::new(gpu.device.alloc(bytes).unwrap());
                let handle = memory.ipc_handle().unwrap();
                shared
                    .push(DeviceRegion::by_handle(handle, Arc::clone(&memory) as Arc<dyn Any + Send + Sync>));
                DeviceRange::whole(&memory)
            }
        })
        .collect();
    regions.iter().zip(fresh()).for_each(|(region, bytes)| gpu.write(region, &bytes));
    let (doorman, _arrivals) = expose(shared).unwrap();
    let DoormanAddress { name, key } = doorman.address();
    let key: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
    println!("{SAYS}{name} {key}");
    for path in std::io::stdin().lines().map_while(Result::ok) {
        let bytes: Vec<u8> = regions.iter().flat_map(|region| gpu.download(region)).collect();
        std::fs::write(path, bytes).unwrap();
        println!("{SAYS}dumped");
    }
}
