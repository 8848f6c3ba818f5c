/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
#pragma once

/* Constants that user space sets before it loads the programs; the verifier removes what they switch off. */

#include "headers/kernel.h"

/* Write events for drops. Counters are always written. */
const volatile __u8 cfg_drop_events = 1;

/* At most this many events per second and CPU. */
const volatile __u32 cfg_event_rate = 1000;
