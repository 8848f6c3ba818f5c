// SPDX-License-Identifier: Apache-2.0

package agent

// noteVanished raises the epochs of pods' devices that are gone while their records are still there: somebody took the network namespace away
// and nobody called DEL. No map has changed, so flows would go on to be sent to the device that is no more; judged anew, they find that
// out, and who is at their other end is told.
func (w *nodeWatcher) noteVanished(s *survey) {
	there := make(map[int]bool, len(s.devices))
	for _, d := range s.devices {
		there[d.index] = true
	}
	vanished := map[int]bool{}
	var fresh []int
	for _, r := range w.pods {
		if there[r.HostIfindex] {
			continue
		}
		vanished[r.HostIfindex] = true
		if !w.vanished[r.HostIfindex] {
			fresh = append(fresh, r.HostIfindex)
		}
	}
	w.vanished = vanished
	if len(fresh) == 0 {
		return
	}
	if err := w.raise(fresh...); err != nil {
		w.log.Error("flows of pods whose devices are gone cannot be judged anew", "err", err)
		for _, index := range fresh {
			delete(w.vanished, index) // the next survey tries again
		}
	}
}
