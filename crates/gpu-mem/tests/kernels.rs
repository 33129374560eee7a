//! CUDA C is compiled for the device at hand, kept on disk, and launched with checked arguments.

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use common::{child, device, on_device, read, succeed};
use gpu_mem::{Arg, Cuda, Device, Error, Launch, Version};

const SOURCE: &str = r#"
struct Scale { float factor; int offset; };

extern "C" __global__ void scale(const float* in, float* out, unsigned long long count, Scale scale) {
    extern __shared__ float shared[];
    for (unsigned long long i = blockIdx.x * (unsigned long long)blockDim.x + threadIdx.x; i < count;
         i += (unsigned long long)gridDim.x * blockDim.x) {
        shared[threadIdx.x] = in[i] * scale.factor;
        out[i] = shared[threadIdx.x] + scale.offset;
    }
}
"#;

#[repr(C)]
#[derive(Clone, Copy)]
struct Scale {
    factor: f32,
    offset: i32,
}

/// The device, if there is an NVRTC too.
fn device_with_nvrtc() -> Option<Device> {
    let device = device()?;
    if let Err(error) = gpu_mem::nvrtc_version() {
        let asked = std::env::var_os("WEIGHTSYNC_HW").is_some_and(|value| value == "1");
        assert!(!asked, "WEIGHTSYNC_HW=1 asks for NVRTC: {error}");
        println!("skipped: no NVRTC");
        return None;
    }
    Some(device)
}

#[test]
fn a_kernel_computes_what_the_source_says() {
    let Some(device) = device_with_nvrtc() else { return };
    let stream = device.stream().unwrap();
    let module = device.compile("scale.cu", SOURCE, &["--std=c++17"]).unwrap();
    let kernel = module.function("scale").unwrap();
    // The function keeps its module.
    drop(module);
    let input: Vec<f32> = (0..60_001_u16).map(f32::from).collect();
    let bytes: Vec<u8> = input.iter().flat_map(|value| value.to_le_bytes()).collect();
    let (from, to) = (on_device(&stream, &bytes), device.alloc(bytes.len() as u64).unwrap());
    let scale = Scale { factor: 0.5, offset: -3 };
    let (from_address, to_address, count) = (from.address(), to.address(), input.len() as u64);
    let args = [Arg::new(&from_address), Arg::new(&to_address), Arg::new(&count), Arg::new(&scale)];
    kernel.allow_shared_bytes(64 << 10).unwrap();
    let launch = Launch { shared_bytes: 60 << 10, ..Launch::linear(64, 256) };
    // SAFETY: the arguments are those of the source; `hold` keeps both buffers until the kernel is done.
    unsafe { kernel.launch(&stream, launch, &args) }.unwrap();
    let (_, to) = stream.hold((from, to)).unwrap().wait().unwrap();
    let output: Vec<f32> = read(&stream, to)
        .1
        .chunks_exact(4)
        .map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()))
        .collect();
    assert_eq!(output, input.iter().map(|value| value * 0.5 - 3.0).collect::<Vec<_>>());

    let resources = kernel.resources().unwrap();
    assert!(
        resources.registers > 0 && kernel.blocks_per_multiprocessor(256, 0).unwrap() > 0,
        "{resources:?}"
    );
}

#[test]
fn arguments_that_do_not_fit_are_refused_before_the_launch() {
    let Some(device) = device_with_nvrtc() else { return };
    if Cuda::open().unwrap().driver_version() < (Version { major: 12, minor: 4 }) {
        println!("skipped: the driver does not tell a kernel's parameters");
        return;
    }
    let stream = device.stream().unwrap();
    let kernel = device.compile("scale.cu", SOURCE, &[]).unwrap().function("scale").unwrap();
    let (eight, four) = (0_u64, 0_u32);
    for args in [
        vec![],
        vec![Arg::new(&eight); 3],
        vec![Arg::new(&eight), Arg::new(&four), Arg::new(&eight), Arg::new(&eight)],
    ] {
        // SAFETY: refused, so nothing runs.
        let error = unsafe { kernel.launch(&stream, Launch::linear(1, 1), &args) }.unwrap_err();
        assert!(matches!(error, Error::Arguments { .. }), "{error}");
        assert!(error.to_string().contains("[8, 8, 8, 8]"), "{error}");
    }
    let args = [Arg::new(&eight), Arg::new(&eight), Arg::new(&eight), Arg::new(&eight)];
    // SAFETY: a count of 0 reaches no memory, and the shape is refused.
    let error = unsafe { kernel.launch(&stream, Launch::linear(1, 100_000), &args) }.unwrap_err();
    assert!(matches!(error, Error::Call(_)), "{error}");
    stream.synchronize().unwrap();
}

#[test]
fn what_does_not_compile_or_does_not_exist_is_told_with_its_name() {
    let Some(device) = device_with_nvrtc() else { return };
    let error = device
        .compile("broken.cu", "extern \"C\" __global__ void broken() { undeclared = 1; }", &[])
        .unwrap_err();
    assert!(matches!(error, Error::Compile { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains("broken.cu(1)") && text.contains("undeclared"), "{text}");
    assert!(device.compile("x.cu", SOURCE, &["--no-such-option"]).is_err());
    assert!(matches!(device.compile("x.cu", "\0", &[]), Err(Error::ZeroByte { .. })));
    let module = device.compile("scale.cu", SOURCE, &[]).unwrap();
    let error = module.function("no_such_kernel").unwrap_err().to_string();
    assert!(error.contains("no_such_kernel") && error.contains("scale.cu"), "{error}");
}

#[test]
fn machine_code_is_kept_and_damage_is_repaired() {
    if device_with_nvrtc().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let run = || {
        succeed(child("a_kernel_computes_what_the_source_says").env("XDG_CACHE_HOME", folder.path()));
        kept(&folder.path().join("weightsync"))
    };
    let first = run();
    assert_eq!(first.len(), 1, "one source, one device, one file");
    assert_eq!(run(), first, "it was read and not written again");
    let (name, (contents, _)) = first.iter().next().unwrap();
    std::fs::write(folder.path().join("weightsync").join(name), &contents[..contents.len() / 2]).unwrap();
    let repaired = run();
    assert_eq!(repaired[name].0, *contents);
}

/// Names, contents and inodes of the files in a folder.
fn kept(folder: &Path) -> BTreeMap<String, (Vec<u8>, u64)> {
    use std::os::unix::fs::MetadataExt;
    let entries = std::fs::read_dir(folder).unwrap().map(Result::unwrap);
    entries
        .map(|entry| {
            let name = entry.file_name().into_string().unwrap();
            (name, (std::fs::read(entry.path()).unwrap(), entry.metadata().unwrap().ino()))
        })
        .collect()
}
