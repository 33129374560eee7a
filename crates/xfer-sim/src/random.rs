//! Numbers that look random and follow from a seed: the only source of chance in this crate.
//!
//! It must never be seeded from the machine. The generator is SplitMix64 (Steele, Lea, Flood 2014): one word of state, and
//! good enough to shuffle arrivals; it is no good for keys.

/// See the module.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed)
    }

    /// From 0 to `end`, exclusive; 0 if `end` is 0.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^= word >> 31;
        // The high half of the product is uniform up to a bias of end / 2^64.
        ((u128::from(word) * u128::from(end)) >> 64) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_words_are_those_of_the_published_generator() {
        // Seed 0 gives e220a8397b1dcdaf, 6e789e6aa1b965f4; below(2^63) keeps all but the lowest bit.
        let mut random = Random::new(0);
        assert_eq!(random.below(1 << 63), 0xe220_a839_7b1d_cdaf >> 1);
        assert_eq!(random.below(1 << 63), 0x6e78_9e6a_a1b9_65f4 >> 1);
        assert_eq!(random.below(0), 0);
    }

    #[test]
    fn numbers_stay_below_the_end_and_reach_all_of_it() {
        let mut random = Random::new(7);
        let mut seen = [false; 5];
        (0..200).for_each(|_| seen[random.below(5) as usize] = true);
        assert_eq!(seen, [true; 5]);
    }
}
