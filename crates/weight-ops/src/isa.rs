//! Runs one kernel as code for the best instructions that this CPU has.
//!
//! Kernels are plain loops, written once. They are compiled three times, and the compiler vectorises each copy for its
//! instructions; so there is no second implementation that could differ. A kernel must not branch on the instruction
//! set, and its result must not depend on it: no fused multiply-add, no approximate reciprocal.

/// A loop over elements.
pub(crate) trait Kernel {
    /// Must be `#[inline(always)]`, and what it calls per element too: only what is inlined is compiled for the
    /// instruction set of the caller.
    fn run(self);
}

/// An instruction set that this CPU was found to have. Only [`Isa::all`] makes one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Isa(Level);

#[derive(Clone, Copy, Debug)]
enum Level {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// What every CPU of the target has: SSE2 on x86-64, NEON on aarch64.
    Baseline,
}

/// Best first.
const LEVELS: &[Level] = &[
    #[cfg(target_arch = "x86_64")]
    Level::Avx512,
    #[cfg(target_arch = "x86_64")]
    Level::Avx2,
    Level::Baseline,
];

impl Level {
    /// The standard library asks the CPU once and remembers.
    fn is_there(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => is_x86_feature_detected!("avx2"),
            Level::Baseline => true,
        }
    }

    fn name(self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => "avx2",
            Level::Baseline => "baseline",
        }
    }
}

impl Isa {
    /// All that this CPU has, the best first.
    pub(crate) fn all() -> impl Iterator<Item = Isa> {
        LEVELS.iter().copied().filter(|level| level.is_there()).map(Isa)
    }

    /// The best that there is.
    pub(crate) fn best() -> Isa {
        Isa::all().next().unwrap_or(Isa(Level::Baseline))
    }

    #[inline]
    #[allow(unsafe_code)]
    pub(crate) fn run(self, kernel: impl Kernel) {
        match self.0 {
            Level::Baseline => kernel.run(),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: an `Isa` of this level is made only where the CPU was found to have these instructions.
            Level::Avx2 => unsafe { run_avx2(kernel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Level::Avx512 => unsafe { run_avx512(kernel) },
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn run_avx2(kernel: impl Kernel) {
    kernel.run();
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn run_avx512(kernel: impl Kernel) {
    kernel.run();
}

/// The instruction set that the kernels run on here, for reports: `avx512`, `avx2` or `baseline`.
pub fn instruction_set() -> &'static str {
    Isa::best().0.name()
}
