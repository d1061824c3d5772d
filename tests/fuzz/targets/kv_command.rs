#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| quorate::fuzzing::kv_command(bytes));
